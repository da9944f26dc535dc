"""Command-line programs: `python -m launch.train --config=configs/quickstart.py`."""
