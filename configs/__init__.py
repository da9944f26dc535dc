"""Run configurations: one file each, with `get_config(arg)`."""
