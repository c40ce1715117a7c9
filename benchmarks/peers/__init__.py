"""Other quantizers, measured on the tokens and with the measures that packlight uses for itself.

Each module runs alone, in an environment that holds its peer and not packlight:

    python -m benchmarks.peers.bnb --model DIRECTORY --windows windows.json --out result.json

`DIRECTORY` is the original in float32, `windows.json` a list of lists of token ids, and `result.json` a list of rows
as `common.Row` describes them.
"""
