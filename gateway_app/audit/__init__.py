"""The record as others read it: MetaQore's trail, its export, and a follower that keeps MetaQore's own file."""
