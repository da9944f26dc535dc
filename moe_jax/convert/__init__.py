"""Checkpoints of other projects in and out.

`families` says what there is, a table a family; `hugging_face` reads and writes a whole checkpoint, `plan` one layer at a time.
"""
