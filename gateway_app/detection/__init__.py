"""Finds private and sensitive data in text: what it finds raises a task's sensitivity and never lowers it."""

from gateway_app.detection.detector import Detector
from gateway_app.detection.findings import KINDS, Findings
from gateway_app.detection.texts import texts_of

__all__ = ["KINDS", "Detector", "Findings", "texts_of"]
