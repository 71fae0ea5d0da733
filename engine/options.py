"""The command line, made from the fields of RunConfig."""

import os
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

import click
from click.core import ParameterSource

from engine.comm import Communicator, connect, ending_together
from engine.config import RunConfig
from engine.errors import exit_on_user_error


def command(defaults_without_data: dict[str, Any]) -> Callable:
    """Makes a function(RunConfig, Communicator) -> exit code a command whose options are the fields of RunConfig.

    Where the data is not named, `defaults_without_data` replaces the defaults of the options that are not given.
    """

    def decorate(function: Callable[[RunConfig, Communicator], int]) -> click.Command:
        @click.pass_context
        @exit_on_user_error
        def callback(context: click.Context, **values: Any) -> int:
            given = {
                name: value
                for name, value in values.items()
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT
            }
            if "train_data" not in given and not given.get("overfit"):
                given = defaults_without_data | given
            comm = connect(os.environ)
            with ending_together(comm):
                code = function(RunConfig(**given), comm)
            return code

        return click.Command(
            name="train.py",
            callback=callback,
            params=[_option(item) for item in fields(RunConfig)],
            help=function.__doc__,
            context_settings={"help_option_names": ["--help"], "max_content_width": 110},
        )

    return decorate


def _option(item: Field) -> click.Option:
    is_switch = isinstance(item.default, bool)
    return click.Option(
        [*item.metadata["flags"], item.name],
        type=_type(item),
        default=item.default,
        show_default=not is_switch and item.default != "",
        metavar="0|1" if is_switch else item.metadata["unit"].upper() or None,
        help=item.metadata["help"] + (f"  [default: {item.default:d}]" if is_switch else ""),
    )


def _type(item: Field) -> Any:
    choices = item.metadata["choices"]
    if choices and isinstance(choices[0], int):
        return click.IntRange(min(choices), max(choices))
    if choices:
        return click.Choice(choices)
    return {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING}[type(item.default)]
