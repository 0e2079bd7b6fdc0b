"""Optimizers, parameter groups, schedules and clipping. Nothing in here reads a value back from the device."""
