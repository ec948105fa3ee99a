"""From the command line to validated Megatron arguments.

Where a value comes from, weakest first: Megatron's own default, this project's and the backend's
defaults, the recipe, the ``--config`` file, the command line.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any, NoReturn

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.component_flags import (
    add_component_arguments,
    processes_of_language,
    take_components,
)
from megatron.mimo.arguments.given import check_effect, given_by_user, said_of, settle_rivals
from megatron.mimo.arguments.layout import check_layout
from megatron.mimo.arguments.part_flags import add_part_arguments, check_parts
from megatron.mimo.arguments.prerequisites import check_prerequisites
from megatron.mimo.arguments.saving import check_saving
from megatron.mimo.arguments.stall import STALL_TIMEOUT, seconds
from megatron.mimo.backend import Capabilities
from megatron.mimo.backend.defaults import (
    argument_defaults,
    check_arguments,
    own_argument_defaults,
)
from megatron.mimo.backend.hooks import ARGUMENTS, PARSER_ERROR
from megatron.mimo.backend.patching import replace_in, replaced
from megatron.mimo.recipes import DEFAULT_RECIPE
from megatron.mimo.recipes.recipe import Recipe

__all__ = ["parse_arguments"]

# What every run of this project wants from Megatron, below the recipe's own defaults.
_PROJECT_DEFAULTS: Mapping[str, object] = {
    # one gradient contract: the summed token loss is divided once, by the global token count
    "calculate_per_token_loss": True,
    # the data layer hands over ready iterators, positioned by consumed samples
    "dataloader_type": "external",
    # SIGTERM saves and exits
    "exit_signal_handler": True,
    # --train-iters may grow between runs, and the schedule with it
    "override_opt_param_scheduler": True,
    # a run may be resumed on another TP/PP/DP layout
    "dist_ckpt_optim_fully_reshardable": True,
    "tokenizer_type": "NullTokenizer",
    "micro_batch_size": 1,
    "eval_iters": 0,
    "eval_interval": 1000,
    "save_interval": 1000,
}


def add_mimo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this project's training layer."""
    group = parser.add_argument_group(title="megatron-mimo")
    group.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        help="what to train: a name from --list-recipes, or package.module:function",
    )
    group.add_argument("--list-recipes", action="store_true", help="list the recipes and exit")
    group.add_argument(
        "--stage", metavar="NAME", help="preset of the recipe, such as projector, full or lora"
    )
    group.add_argument(
        "--config", metavar="FILE.yaml", help="flags by name; weaker than the command line"
    )
    add_part_arguments(group)
    add_component_arguments(group)
    group.add_argument(
        "--pack",
        action="store_true",
        help="put as many training samples into each sequence of --seq-length as fit; a batch "
        "then counts sequences, and --micro-batch-size is 1",
    )
    group.add_argument(
        "--output", metavar="DIR", help="run directory (default: runs/<recipe>)", default=None
    )
    group.add_argument(
        "--no-output", action="store_true", help="keep nothing: no checkpoint, no TensorBoard"
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        default=2,
        metavar="N",
        help="how many of the newest checkpoints stay on disk (0: all)",
    )
    group.add_argument(
        "--no-checkpoint-hashes",
        action="store_false",
        dest="checkpoint_hashes",
        help="neither write hashes of a checkpoint's files nor compare them when it is loaded",
    )
    group.add_argument(
        "--stall-timeout",
        type=seconds,
        default=STALL_TIMEOUT,
        metavar="SECONDS",
        help="end a rank that has stood still for so long, with its stacks; it is warned of after "
        "20 s (0: never end it)",
    )
    group.add_argument(
        "--row-kernels",
        choices=("triton", "torch"),
        help="what puts rows of text and media into the sequence, and gathers their gradients "
        "(default: triton where there is one, on a GPU)",
    )
    group.add_argument("--fp32", action="store_true", help="train in fp32 where bf16 is usual")
    group.add_argument("--verbose", action="store_true", help="show all that Megatron prints")


def parse_arguments(
    recipe: Recipe,
    *,
    machine: Capabilities,
    config: Mapping[str, Any],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse and validate all arguments with Megatron's own parser.

    Args:
        recipe: its ``arguments`` become defaults, its ``add_arguments`` extends the parser.
        machine: what the run has to compute with, as ``capabilities()`` says.
        config: content of the configuration file, as ``read_config`` returns it.
        argv: command line without the program's name; None for the process's own.

    Raises:
        ConfigError: an unknown flag or key, a value that does not fit, or a combination that
            Megatron refuses.
    """
    from megatron.training.arguments import parse_args, validate_args

    def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        replace_in(parser, PARSER_ERROR, lambda _: partial(_refuse, parser=parser))
        add_mimo_arguments(parser)
        if recipe.add_arguments is not None:
            recipe.add_arguments(parser)
        weak = {
            **_PROJECT_DEFAULTS,
            **argument_defaults(machine),
            **own_argument_defaults(machine),
        }
        parser.set_defaults(**weak)
        from_file = config_values(parser, config)
        given.update(given_by_user(parser, sys.argv[1:], from_file))
        told.extend(check_effect(parser, recipe, given))
        parsers.append(parser)
        recipe_values = _recipe_defaults(recipe, parser, from_file)
        known = {action.dest for action in parser._actions}
        _check_names(recipe_values, known, source=f"recipe {recipe.name!r}")
        parser.set_defaults(**settle_rivals(parser, recipe_values, given))
        parser.set_defaults(**from_file)
        return parser

    told: list[str] = []
    given: dict[str, Any] = {}
    parsers: list[argparse.ArgumentParser] = []
    with _command_line(argv):
        args = parse_args(extend)
    _derive(args, machine)
    check_arguments(args, machine)
    check_prerequisites(args, machine)
    with processes_of_language(args):
        check_layout(args)
        check_parts(args)
        check_saving(args)
        if recipe.check is not None:
            recipe.check(args)
        try:
            with _overheard() as lines:
                validate_args(args)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"Megatron refuses these arguments: {_reason(error)}") from error
    args.read_over = told + said_of(given, parsers[0], "\n".join(lines))
    return args


def config_values(parser: argparse.ArgumentParser, config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert configuration entries into argument values, by the rules of the parser.

    A key is a flag's name (``no_rope_fusion: true``) or the argument's name
    (``rope_fusion: false``).

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of the wrong kind.
    """
    by_flag = {
        flag.removeprefix("--").replace("-", "_"): (flag, action)
        for action in parser._actions  # argparse has no public list of a parser's flags
        for flag in action.option_strings
        if flag.startswith("--")
    }
    by_name = {action.dest: action for action in parser._actions if action.option_strings}
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in by_flag:
            flag, action = by_flag[key]
        elif key in by_name:
            action = by_name[key]
            flag = max(action.option_strings, key=len)
        else:
            near = difflib.get_close_matches(key, [*by_flag, *by_name], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--config: unknown key {key!r}{hint}")
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ConfigError(f"--config: {key!r} is a switch: true or false, got {value!r}")
            switched_on = value if key in by_flag else value == action.const
            values[action.dest] = action.const if switched_on else not action.const
        elif value is None:
            values[action.dest] = None
        else:
            if isinstance(value, Mapping):  # module-lr: {images.encoders: 2e-6}
                value = [f"{name}={_joined(item)}" for name, item in value.items()]
            words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            joined = [f"{flag}={words[0]}"] if action.nargs is None and len(words) == 1 else None
            parsed, _ = parser.parse_known_args(joined or [flag, *words])
            values[action.dest] = getattr(parsed, action.dest)
    return values


def _joined(value: Any) -> Any:
    """A mapping within a mapping, as a flag writes it: component: {images: {tp: 1, dp: 8}}."""
    if not isinstance(value, Mapping):
        return value
    return ",".join(f"{name}={item}" for name, item in value.items())


def _recipe_defaults(
    recipe: Recipe, parser: argparse.ArgumentParser, from_file: Mapping[str, Any]
) -> dict[str, object]:
    """The recipe's defaults, given the flags so far: its description, arguments and preset."""
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    given, _ = parser.parse_known_args(words, argparse.Namespace(**from_file))
    _name_folders(given)
    stage = given.stage or recipe.default_preset
    if stage is not None and stage not in recipe.presets:
        has = f"it has {', '.join(recipe.presets)}" if recipe.presets else "it has none"
        raise ConfigError(f"--stage {stage}: recipe {recipe.name!r} has no such stage; {has}")
    if recipe.require is not None:
        recipe.require(given)
    described = {} if recipe.describe is None else recipe.describe(given)
    preset = {} if stage is None else recipe.presets[stage]
    return {**described, **recipe.arguments, **preset, "stage": stage}


def _check_names(values: Mapping[str, object], known: Collection[str], *, source: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: Megatron has no argument {name!r}{hint}")


def _derive(args: argparse.Namespace, machine: Capabilities) -> None:
    """Fill in what depends on other arguments."""
    take_components(args)
    args.explicit_load = args.load is not None
    if machine.device == "cuda" and not (args.fp16 or args.fp32 or args.bf16):
        args.bf16 = True
    if args.fp32 and (args.fp16 or args.bf16):
        raise ConfigError("--fp32 excludes --fp16 and --bf16; give one of the three")
    if args.rerun_mode == "report_stats":  # the flag's word; the machine knows another
        args.rerun_mode = "report_determinism_stats"
    if args.profile:
        # Megatron's other way marks steps for Nsight Systems, which is what its ranges are for
        args.use_pytorch_profiler |= not args.nvtx_ranges
        args.profile_ranks = args.profile_ranks or [0]
    if args.num_experts and not args.swiglu:
        args.bias_gelu_fusion = False  # Megatron's experts do not have it, and raise
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Megatron demands it; it has no effect without CUDA
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _name_folders(args)
    if args.data_path and args.valid_data_path:  # Megatron takes --data-path alone
        args.train_data_path, args.data_path = args.data_path, None
    if args.eval_iters is None:
        args.eval_iters = 0


def _name_folders(args: argparse.Namespace) -> None:
    """Set the folders in which the run reads and writes."""
    if args.no_output:
        args.output = args.save = args.tensorboard_dir = None
    else:
        args.output = args.output or f"runs/{args.recipe.rpartition(':')[2]}"
        args.save = args.save or f"{args.output}/checkpoints"
        args.load = args.load or args.save
        args.tensorboard_dir = args.tensorboard_dir or f"{args.output}/tensorboard"


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect the lines that are printed and warned of in this context; print them at its end."""
    lines: list[str] = []
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed):
            warnings.simplefilter("always")
            yield lines
    finally:
        warned = [" ".join(str(warning.message).split()) for warning in caught]
        lines.extend([*printed.getvalue().splitlines(), *warned])
        print("\n".join(lines))


@contextmanager
def _command_line(argv: Sequence[str] | None) -> Iterator[None]:
    """Megatron's parser reads ``sys.argv`` only; give it ours for the time of the call."""
    if argv is None:
        yield
        return
    with replaced({ARGUMENTS: lambda own: [own[0], *argv]}):
        yield


def _refuse(message: str, parser: argparse.ArgumentParser | None = None) -> NoReturn:
    prefix = "unrecognized arguments: "
    if parser is None or not message.startswith(prefix):
        raise ConfigError(message)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    words = message.removeprefix(prefix).split()
    unknown = next((word for word in words if word.startswith("-")), words[0])
    near = difflib.get_close_matches(unknown.partition("=")[0], flags, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all flags"
    raise ConfigError(f"unknown flag {unknown}{hint}")


def _reason(error: BaseException) -> str:
    """The error's message, or the source line of a bare ``assert``."""
    text = str(error).strip()
    if text:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at `{frame.line}`"
