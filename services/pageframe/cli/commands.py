"""The table of the subcommands of ``pageframe``, and what their exit codes mean."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pageframe.cli.ahead import Ahead
from pageframe.cli.console import open_console
from pageframe.cli.exit_codes import EXIT_BAD_ENVIRONMENT
from pageframe.config.settings import OPTION_FIELDS, Settings, load_settings, variable_name
from pageframe.core.errors import InvalidRequestError, PageframeError

_SWITCHES = {
    "on": True, "true": True, "yes": True, "1": True,
    "off": False, "false": False, "no": False, "0": False,
}  # fmt: skip
# Where the stored default is not what a person would write.
_DEFAULT_WORDS = {
    "deterministic": "off",
    "kv-memory": "auto",
    "lookahead": "on",
    "prefix-cache": "on",
    "tenant-quotas": "off",
    "session-ttl": "10m",
    "session-idle": "60s",
    "api-keys": "off",
    "tls-cert": "off",
    "tls-key": "off",
    "tls-client-ca": "off",
    "tls-peer-ca": "off",
    "tls-peer-cert": "off",
    "tls-peer-key": "off",
    "tls-peer-name": "empty",
    "peer-timeout": "15s",
    "record": "off",
    "state-dir": "~/.pageframe or $XDG_STATE_HOME/pageframe",
    "drain-timeout": "30s",
}
_PROGRAM = "pageframe"
# By what a shell tells that it wants to know how a line could go on.
_COMPLETE_VARIABLE = "_PAGEFRAME_COMPLETE"
_OWN_COMMANDS = ("up", "serve", "model")
# Commands with heavy imports of their own: loaded only when asked for, or for the help.
_LAZY_COMMANDS = {
    "generate": "pageframe.cli.generate",
    "chat": "pageframe.cli.chat",
    "key": "pageframe.cli.key",
    "pool": "pageframe.cli.pool",
    "bench": "pageframe.cli.bench",
    "simulate": "pageframe.cli.simulate",
    "replay": "pageframe.cli.replay",
    "stalls": "pageframe.cli.stalls",
    "health": "pageframe.cli.health",
}


def up(context: typer.Context, config: Path | None, **flags: Any) -> None:
    """Serve a model: start gateway, scheduler and executor under one supervisor.

    Ctrl-C drains. The last line on standard output is
    `pageframe ready grpc=HOST:PORT http=HOST:PORT kernels=fused`.
    """
    from pageframe.cli.up import run_up

    given = {option: flags[name] for option, name in OPTION_FIELDS.items()}
    settings = load_settings(given, os.environ, config_path=config)
    raise typer.Exit(run_up(settings, os.environ, open_console(), context.obj))


def serve(
    service: str,
    listen: str,
    executor: list[str] | None,
    scheduler: list[str] | None,
    config: Path | None,
    **flags: Any,
) -> None:
    """Serve one service alone, for machines and containers of its own.

    Where it listens and whom it calls is given; all else are settings, as for `up`.
    """
    from pageframe.cli.serve import Addresses, ServiceName, run_serve

    given = {option: flags[name] for option, name in OPTION_FIELDS.items()}
    settings = load_settings(given, os.environ, config_path=config)
    addresses = Addresses(
        listen=listen, executor=",".join(executor or ()), scheduler=",".join(scheduler or ())
    )
    chosen = ServiceName(service)
    raise typer.Exit(run_serve(chosen, addresses, settings, os.environ, open_console()))


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


def _address_parameter(name: str, help_text: str) -> inspect.Parameter:
    """One option for an address that is no setting, since no two services share its meaning."""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default="",
        annotation=Annotated[
            str, typer.Option(f"--{name}", help=help_text, metavar="HOST:PORT", show_default=False)
        ],
    )


def _addresses_parameter(name: str, help_text: str) -> inspect.Parameter:
    """The same for an option that may be given several times."""
    option_info = typer.Option(f"--{name}", help=help_text, metavar="HOST:PORT", show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[list[str] | None, option_info],
    )


_CONTEXT_PARAMETER = inspect.Parameter(
    "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
)
_SERVE_PARAMETERS = (
    inspect.Parameter(
        "service",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[
            Literal["gateway", "scheduler", "executor"],
            typer.Argument(help="Which one; comes before all options.", show_default=False),
        ],
    ),
    _address_parameter("listen", "Where this service listens; scheduler and executor."),
    _addresses_parameter(
        "executor",
        "Where the executor is reached; scheduler. For a gateway's /pool as --scheduler.",
    ),
    _addresses_parameter(
        "scheduler",
        "Where a scheduler is reached, or dns:///NAME:PORT for all addresses of a name; once for "
        "each replica; gateway.",
    ),
)


def with_setting_options(
    command: Callable[..., None], *own_parameters: inspect.Parameter
) -> Callable[..., None]:
    """Give a command ``--config`` and an option for every setting, after parameters of its own.

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
    parameters = [*own_parameters, config, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def build_app(wanted: str | None) -> typer.Typer:
    """The command tree; of the lazy commands only ``wanted``, or all when that is None."""
    app = typer.Typer(
        name="pageframe",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Plain text: an error is a line, in a log as on a terminal.
        rich_markup_mode=None,
        help="Serves language models with paged KV memory, and traces every page.",
    )
    model_app = typer.Typer(no_args_is_help=True, help="Models on this machine.")
    model_app.command("prepare")(prepare)
    app.command("up")(with_setting_options(up, _CONTEXT_PARAMETER))
    app.command("serve")(with_setting_options(serve, *_SERVE_PARAMETERS))
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


def wanted_command(given: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """The command to load; None for all of them: for the help, and to guess at a misspelt one.

    A shell that wants to complete a line says in its environment how that begins.
    """
    words = list(given)
    if _COMPLETE_VARIABLE in environ:
        line = environ.get("_TYPER_COMPLETE_ARGS") or environ.get("COMP_WORDS", "")
        words = line.split()[1:]
    named = next((word for word in words if not word.startswith("-")), None)
    return named if named in _LAZY_COMMANDS or named in _OWN_COMMANDS else None


def run(given: Sequence[str], ahead: Ahead | None = None) -> None:
    """Run a command line; ends the process with one of the codes of ``exit_codes``.

    Args:
        given: The command and its arguments.
        ahead: The executor, if it has been started already.
    """
    given = list(given)
    try:
        if given[:1] in (["up"], ["serve"]):
            given = join_switch_words(given)
        app = build_app(wanted_command(given, os.environ))
        app(args=given, prog_name=_PROGRAM, obj=ahead)
    except PageframeError as error:
        print(f"pageframe: {error.message}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_ENVIRONMENT) from None
