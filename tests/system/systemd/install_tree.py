"""The tree of files that is laid over the machine's root: ksmd, installed as an operator would.

The package is copied (an editable one may lie in a home directory, which services do not see) into
a virtual environment in /opt; ``ksmd install`` does the rest.
"""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ksmd

SCRIPTS = Path(sysconfig.get_path("scripts"))
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LAUNCHER = """\
#!/opt/ksmd/bin/python -P
import sys
from ksmd.cli.{name} import main
sys.exit(main())
"""


def make(tree: Path) -> None:
    """Fill *tree*, which is an empty directory."""
    packages = tree / "opt/ksmd/lib" / _VERSION / "site-packages"
    packages.mkdir(parents=True)
    (tree / "opt/ksmd/bin").mkdir()
    (tree / "opt/ksmd/bin/python").symlink_to(f"/opt/python/bin/{_VERSION}")
    (tree / "opt/ksmd/pyvenv.cfg").write_text("home = /opt/python/bin\n")
    shutil.copytree(Path(ksmd.__file__).parent, packages / "ksmd")
    # as pip does; a service cannot, and would compile everything at each of its starts
    compileall.compile_dir(packages / "ksmd", quiet=2)
    (packages / "libraries.pth").write_text("/opt/libraries\n")
    (tree / "usr/bin").mkdir(parents=True)
    for name in ("ksmd", "ksmctl"):
        program = tree / "usr/bin" / name
        program.write_text(_LAUNCHER.format(name=name))
        program.chmod(0o755)
    for name in ("python", "libraries"):
        (tree / "opt" / name).mkdir()
    install(tree, "--apply")


def install(tree: Path, *options: str) -> str:
    """Run ``ksmd install`` for the tree: what it says."""
    command = [SCRIPTS / "ksmd", "install", "--root", tree, "--prefix", "/usr"]
    return subprocess.run(
        [*command, "--program", "/usr/bin/ksmd", *options],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
