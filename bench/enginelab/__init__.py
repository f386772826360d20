"""What bench/engine.py is made of: checkpoints, prompts, the engine alone, the gateway, and who runs on which core."""
