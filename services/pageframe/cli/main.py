"""The ``pageframe`` command: the table of its subcommands, and what their exit codes mean."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pageframe.cli.console import open_console
from pageframe.cli.exit_codes import EXIT_BAD_ENVIRONMENT, EXIT_INTERRUPTED
from pageframe.config.settings import OPTION_FIELDS, Settings, load_settings, variable_name
from pageframe.core.errors import InvalidRequestError, PageframeError

_SWITCHES = {
    "on": True, "true": True, "yes": True, "1": True,
    "off": False, "false": False, "no": False, "0": False,
}  # fmt: skip
# Where the stored default is not what a person would write.
_DEFAULT_WORDS = {
    "kv-memory": "auto",
    "lookahead": "on",
    "prefix-cache": "on",
    "tenant-quotas": "off",
    "session-ttl": "10m",
    "session-idle": "60s",
    "api-keys": "off",
    "record": "off",
    "state-dir": "~/.pageframe or $XDG_STATE_HOME/pageframe",
    "drain-timeout": "30s",
}
# Commands with heavy imports of their own: loaded only when asked for, or for the help.
_LAZY_COMMANDS = {
    "generate": "pageframe.cli.generate",
    "pool": "pageframe.cli.pool",
    "bench": "pageframe.cli.bench",
    "simulate": "pageframe.cli.simulate",
    "replay": "pageframe.cli.replay",
    "stalls": "pageframe.cli.stalls",
}


def up(config: Path | None, **flags: Any) -> None:
    """Serve a model: start gateway, scheduler and executor under one supervisor.

    Ctrl-C drains. The last line on standard output is
    `pageframe ready grpc=HOST:PORT http=HOST:PORT kernels=fused`.
    """
    from pageframe.cli.up import run_up

    given = {option: flags[name] for option, name in OPTION_FIELDS.items()}
    settings = load_settings(given, os.environ, config_path=config)
    raise typer.Exit(run_up(settings, os.environ, open_console()))


def prepare(name: Annotated[str, typer.Argument(help="Prepared name, folder or hub id.")]) -> None:
    """Put a model in the cache and print its folder as the last line."""
    from pageframe.cli.model_prepare import prepare_model

    console = open_console()
    with console:
        folder = prepare_model(name, console)
    print(folder)


def _setting_parameter(option: str, name: str) -> inspect.Parameter:
    """One command-line option for one setting, described by the setting itself."""
    field = Settings.model_fields[name]
    is_switch = field.annotation is bool
    declarations = f"--{option}/--no-{option}" if is_switch else f"--{option}"
    default = _DEFAULT_WORDS.get(option, field.default)
    help_text = f"{field.description} [{variable_name(option)}, default {default}]"
    option_info = typer.Option(declarations, help=help_text, show_default=False)
    kind = bool | None if is_switch else str | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, option_info],
    )


def with_setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--config`` and an option for every setting.

    Values stay text here: flags, variables and the file are checked in one place.
    """
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None, typer.Option("--config", help="TOML file of settings [PAGEFRAME_CONFIG].")
        ],
    )
    options = [_setting_parameter(option, name) for option, name in OPTION_FIELDS.items()]
    parameters = [config, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def build_app(wanted: str | None) -> typer.Typer:
    """The command tree; of the lazy commands only ``wanted``, or all when that is None."""
    app = typer.Typer(
        name="pageframe",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # Plain text: an error is a line, in a log as on a terminal.
        rich_markup_mode=None,
        help="Serves language models with paged KV memory, and traces every page.",
    )
    model_app = typer.Typer(no_args_is_help=True, help="Models on this machine.")
    model_app.command("prepare")(prepare)
    app.command("up")(with_setting_options(up))
    app.add_typer(model_app, name="model")
    for name, module_name in _LAZY_COMMANDS.items():
        if wanted in (None, name) and importlib.util.find_spec(module_name):
            _register(app, name, module_name)
    return app


def _register(app: typer.Typer, name: str, module_name: str) -> None:
    module = importlib.import_module(module_name)
    command = getattr(module, name)
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def join_switch_words(arguments: Sequence[str]) -> list[str]:
    """Turn ``--lookahead off`` and ``--lookahead=off`` into ``--no-lookahead``.

    Only for commands without arguments of their own: a word after a switch is its value.

    Raises:
        InvalidRequestError: ``SETTING_MALFORMED`` if the word is neither yes nor no.
    """
    switches = {
        f"--{option}"
        for option, name in OPTION_FIELDS.items()
        if Settings.model_fields[name].annotation is bool
    }
    joined: list[str] = []
    for argument in arguments:
        flag, separator, word = argument.partition("=")
        if separator and flag in switches:
            joined.append(_switch(flag, word))
        elif joined and joined[-1] in switches and not argument.startswith("-"):
            joined[-1] = _switch(joined[-1], argument)
        else:
            joined.append(argument)
    return joined


def _switch(flag: str, word: str) -> str:
    if word.lower() not in _SWITCHES:
        message = f"malformed setting {flag}: {word!r} must be on or off"
        raise InvalidRequestError("SETTING_MALFORMED", message)
    return flag if _SWITCHES[word.lower()] else f"--no-{flag.removeprefix('--')}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with one of the codes of ``exit_codes``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [argument for argument in given if not argument.startswith("-")]
    try:
        if given[:1] == ["up"]:
            given = join_switch_words(given)
        build_app(words[0] if words else None)(args=given)
    except PageframeError as error:
        print(f"pageframe: {error.message}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_ENVIRONMENT) from None
    except KeyboardInterrupt:
        print("pageframe: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
