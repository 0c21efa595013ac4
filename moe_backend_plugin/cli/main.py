"""The ``moe-backend`` command.

Importing this module imports typer and nothing heavier: each command imports what it needs when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moe_backend_plugin import __version__
from moe_backend_plugin.cli.bench import app as bench_app
from moe_backend_plugin.cli.config import app as config_app
from moe_backend_plugin.cli.doctor import doctor
from moe_backend_plugin.cli.quantize import quantize
from moe_backend_plugin.cli.tune import tune
from moe_backend_plugin.cli.verify import verify

app = typer.Typer(
    name="moe-backend", help="Serve NVFP4 MoE and gated-delta-net models: check, quantise, verify.", no_args_is_help=True,
    pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False,
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        print(f"moe-backend-plugin {__version__}")
        raise typer.Exit()


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


app.command()(doctor)
app.add_typer(config_app, name="config")
app.command()(quantize)
app.command()(verify)
app.command()(tune)
app.add_typer(bench_app, name="bench")

if __name__ == "__main__":
    app()
