"""Published models, a file each: sizes, routing and positions as published, with the source named; the rest is `configs/base.py`.

    python -m launch.describe --config=configs/published/mixtral_8x7b.py
    python -m launch.train --config=configs/published/mixtral_8x7b.py:debug
    python -m launch.train --config=configs/published/mixtral_8x7b.py:h100-64,data.seq_len=8192

After the colon stand presets (configs/published/presets.py) and `group.field=value`, applied in order. Where a config is not the
published model to the last operation, its docstring says in what.
"""
