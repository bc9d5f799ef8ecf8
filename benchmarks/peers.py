"""What other packages compute, for tests to compare with: `tests/fixtures/trl_jsd.json`, from TRL's `generalized_jsd_loss`.

    .venv/bin/python benchmarks/peers.py

The peers are no dependencies of ours. They are installed, at the versions below and without their own dependencies, into an environment of their
own, `build/peers`, which sees the packages of the one that runs this script (PyTorch, transformers and numpy are therefore those of constraints.txt).
`make test` reads the committed file and needs neither peers nor network.
"""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

from _common import ROOT

PEERS = ("trl==1.16.0",)
ENVIRONMENT = ROOT / "build" / "peers"


def main() -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        ours = sysconfig.get_paths()["purelib"]
        theirs = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True, capture_output=True, text=True
        ).stdout.strip()
        Path(theirs, "ours.pth").write_text(ours + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PEERS], check=True)
    subprocess.run([python, ROOT / "benchmarks" / "peers_trl.py"], check=True)


if __name__ == "__main__":
    main()
