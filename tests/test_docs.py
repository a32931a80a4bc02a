"""The blocks of README and docs run as written: python and console ones in order, a page a folder; sh blocks are only shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    return [block for block in BLOCK.findall(page.read_text()) if block[0] in ("python", "console")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, offrl):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for kind, file, text in blocks(page):
        if file:
            (tmp_path / file).write_text(text)
        if kind == "python":
            commands = [[sys.executable, "-c", text]]
        else:
            commands = [line.split(" #")[0].split() for line in text.splitlines() if not line.startswith("make ")]
        for command in commands:
            if command[0] == "offrl":
                code, out, err = offrl.start(*command[1:], cwd=tmp_path, env=own).ended(300)
            else:
                done = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
                code, out, err = done.returncode, done.stdout, done.stderr
            assert code == 0, f"{' '.join(command)}\n{out}\n{err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
