"""A stranger's environment: our wheel and theirs, installed by pip where nothing of this checkout can be imported."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def build(source: Path, out: Path) -> Path:
    """The wheel of the project in ``source``."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


class Environment:
    """A fresh virtual environment.

    What our wheel depends on is lent by the environment the tests run in, through a .pth file; neither lightllm nor
    its entry points are, as these come from an editable install that is taken out of the path.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        site = next(folder.glob("lib/python*/site-packages"))
        lent = folder / "lent"
        lent.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(("lightllm", "_lightllm", "pip", "__editable__")):
                (lent / entry.name).symlink_to(entry)
        (site / "lent.pth").write_text(str(lent))

    def install(self, wheel: Path) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
        subprocess.run([*command, str(wheel)], check=True, capture_output=True)

    def uninstall(self, distribution: str) -> None:
        command = [str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", distribution]
        subprocess.run(command, check=True, capture_output=True)

    def command(self) -> list[str]:
        return [str(self.python.parent / "lightllm-serve")]
