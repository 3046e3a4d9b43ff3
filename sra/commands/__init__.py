"""The commands of `sra`, a file each: `add` describes its arguments, `run` does it.

Heavy libraries are imported in `run`, so that `sra --help` is quick.
"""

MODEL = "a hub id, a folder, or a name that `sra demo` downloads (SmolLM2-135M-Instruct, ...)"
