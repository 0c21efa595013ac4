"""``moe-backend config``: the settings in force, and what can be set."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_backend_plugin.cli.output import command, print_json, print_table

app = typer.Typer(help="The plugin's settings.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
@command
def show(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the settings from the file and the environment, and where each came from."""
    from moe_backend_plugin.config import describe, load_config

    settings = describe(load_config())
    if json:
        print_json({setting.field: {"value": setting.value, "source": setting.source} for setting in settings})
    else:
        print_table("settings", ("setting", "value", "source"), settings)


@app.command()
@command
def schema() -> None:
    """Print the JSON schema of the settings: names, values, defaults and meaning."""
    from moe_backend_plugin.config import PluginConfig

    print_json(PluginConfig.model_json_schema())
