#!/usr/bin/env python3
"""An engine and this package for a machine without a network; needs nothing but Python 3.11 with pip and venv.

With a network, on a machine of the same kind (operating system, processor, Python version) as the one without:

    python3 deploy/offline/bundle.py make --engine vllm bundle      # or sglang; or none: this package alone, beside an engine that is there

Then carry the folder over, and there:

    python3 bundle/bundle.py install --into /opt/moe                # a virtual environment, made if it does not exist
    /opt/moe/bin/moe-backend doctor

``make`` leaves every wheel in ``bundle/wheels`` and its SHA-256 in ``bundle/requirements.txt``. ``install`` asks no index, installs these
files and no others, and stops where one has another hash. An index of your own is named by pip's usual settings, such as PIP_INDEX_URL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ENGINES = ("vllm", "sglang", "none")
SOURCES = Path(__file__).resolve().parents[2]
WHEELS, REQUIREMENTS, MADE_ON = "wheels", "requirements.txt", "bundle.json"


class BundleError(Exception):
    """What is wrong, in one line."""


def machine() -> dict[str, str]:
    """What wheels depend on."""
    version = ".".join(platform.python_version_tuple()[:2])
    return {"python": f"{platform.python_implementation()} {version}", "system": platform.system(), "processor": platform.machine()}


def pip(python: Path | str, *arguments: str | Path) -> None:
    """Raises BundleError where pip fails; it has said why."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    if done := subprocess.run(command).returncode:
        raise BundleError(f"exit code {done} of: {' '.join(command[2:])}")


def digest(file: Path) -> str:
    """SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def requirements(wheels: Path) -> str:
    """A line for each wheel of a folder, in pip's form with a hash. Raises BundleError on two versions of one package."""
    lines: dict[str, str] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if name in lines:
            raise BundleError(f"{wheels} has two wheels of {name}; make the bundle in an empty folder")
        lines[name] = f"{name}=={version} --hash=sha256:{digest(wheel)}\n"
    return "".join(lines.values())


def make(engine: str, out: Path, also: list[str]) -> None:
    """Fill the folder ``out``, which must be empty or new. Raises BundleError."""
    if out.exists() and any(out.iterdir()):
        raise BundleError(f"{out} is not empty")
    wheels = out / WHEELS
    wheels.mkdir(parents=True)
    pip(sys.executable, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, SOURCES)
    if engine != "none":
        (own,) = wheels.glob("*.whl")
        # Not `pip download`: what the index has as sources only is built here, where a compiler may be.
        pip(sys.executable, "wheel", "--wheel-dir", wheels, f"moe-backend-plugin[{engine}] @ {own.resolve().as_uri()}", *also)
    elif also:
        pip(sys.executable, "wheel", "--wheel-dir", wheels, "--no-deps", *also)
    (out / REQUIREMENTS).write_text(requirements(wheels))
    (out / MADE_ON).write_text(json.dumps({"engine": engine, **machine()}, indent=1) + "\n")
    shutil.copy(__file__, out)
    found = [wheel.stat().st_size for wheel in wheels.glob("*.whl")]
    print(f"{out}: {len(found)} wheels, {sum(found) / 1e6:.0f} MB; carry it over and run {Path(__file__).name} install there")


def install(bundle: Path, into: Path) -> None:
    """Install a bundle into the virtual environment ``into``. Raises BundleError."""
    if not (bundle / MADE_ON).is_file():
        raise BundleError(f"{bundle} has no {MADE_ON}: run the copy of this script in a bundle that `make` made, or name one with --bundle")
    made = json.loads((bundle / MADE_ON).read_text())
    different = {key: made[key] for key, value in machine().items() if made[key] != value}
    if different:
        raise BundleError(f"made for {', '.join(different.values())}; this is {', '.join(machine().values())}")
    if not (into / "bin/python").exists():
        venv.create(into, with_pip=True)
    python = into / "bin/python"
    # Every wheel is listed, with its hash: no dependency has to be looked for, and nothing else can get in.
    options = ("--no-index", "--no-deps", "--require-hashes", "--find-links", bundle / WHEELS)
    with tempfile.TemporaryDirectory() as empty:  # pip's own settings may name an index or a folder of wheels
        os.environ.update(PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=empty)
        pip(python, "install", "--quiet", *options, "--requirement", bundle / REQUIREMENTS)
    if made["engine"] != "none":
        pip(python, "check")
    print(f"{into}: installed; {into / 'bin/moe-backend'} doctor says what this machine serves")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="collect the wheels; needs a network")
    making.add_argument("out", type=Path)
    making.add_argument("--engine", choices=ENGINES, required=True)
    making.add_argument(
        "--also", action="append", default=[], metavar="REQUIREMENT", help="a further package, or a pin such as torch==2.13.0"
    )
    installing = commands.add_parser("install", help="install them; needs none")
    installing.add_argument("--into", type=Path, required=True, metavar="ENVIRONMENT")
    installing.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="default: the folder of this script")
    arguments = parser.parse_args()
    try:
        if arguments.command == "make":
            make(arguments.engine, arguments.out, arguments.also)
        else:
            install(arguments.bundle, arguments.into)
    except BundleError as error:
        sys.exit(f"bundle: {error}")


if __name__ == "__main__":
    main()
