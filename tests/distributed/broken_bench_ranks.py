"""Ranks of `epctl bench multimodal-sp` with a severed gradient: the gate must stop them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from epctl.bench.multimodal_sp_ranks import main
from epctl.runtime.leave import leave
from epctl.runtime.sequence import vision

if __name__ == "__main__":
    whole = vision.to_owners
    vision.to_owners = lambda rows, *rest: whole(rows.detach(), *rest)
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except SystemExit as ended:
        leave(int(ended.code or 0))
    leave(0)
