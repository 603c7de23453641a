"""TARGET on the command line: where a model and its example inputs come from.

    path/to/file.py:name   package.module:name   a function returning (model, example_inputs), or an nn.Module (class)
    hf:MODEL_TYPE                                a Hugging Face causal language model from its default config and --set

A class or instance has `example_inputs` as an attribute, or its file has; either may be a function. Models are built
on the meta device, which costs no memory and no time however large they are, unless a command has to run them.
TargetNotFound says which part of a target is missing, and what is there instead.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from costmodel.errors import AutoparError, BadArgument, TargetNotFound

HUB = "hf:"
BATCH, SEQ = 8, 128
ExampleInputs = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """A model with the arguments of one call."""

    model: nn.Module
    example_inputs: ExampleInputs


def resolve(
    text: str,
    *,
    meta: bool,
    settings: Sequence[str] = (),
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
) -> Target:
    """The model of a TARGET and its example inputs; on the meta device if `meta` and the model can be built there.

    `settings` are KEY=VALUE changes of an hf: target's config; `batch` and `seq` the size of its inputs.
    TargetNotFound names the part of the target that is missing or of the wrong form; BadArgument is for the rest.
    """
    for name, value in (("--batch", batch), ("--seq", seq)):
        if value is not None and value < 1:
            raise BadArgument(f"{name} {value}", use="a positive number")
    torch.manual_seed(seed)
    if text.startswith(HUB):
        return _hub_model(text.removeprefix(HUB), meta, settings, batch or BATCH, seq or SEQ)
    given = [name for name, value in (("--set", settings), ("--batch", batch), ("--seq", seq)) if value]
    if given:
        raise BadArgument(f"{' and '.join(given)} are for hf: targets", why=f"{text} brings its own model and inputs")
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise TargetNotFound(f"the target {text!r} has no {'name' if colon and place else 'colon and name'}", use=FORMS)
    module = _file_module(place) if place.endswith(".py") or "/" in place else _named_module(place)
    return _built(_attribute(module, name, place), module, text, meta)


FORMS = "path/to/file.py:name, package.module:name or hf:MODEL_TYPE"


# ---- files and modules --------------------------------------------------------------------------------------------


def _file_module(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], 3, 0.4
        )
        missing = f"there is no file {place}" if path.parent.is_dir() else f"there is no folder {path.parent}"
        raise TargetNotFound(missing, use=", ".join(str(path.parent / name) for name in near) or FORMS)
    name = re.sub(r"\W", "_", path.stem)
    while name in sys.modules:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetNotFound(f"{place} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` does: the file's own imports are beside it
    sys.modules[name] = module
    with _of_the_user(f"importing {place}", path):
        spec.loader.exec_module(module)
    return module


def _named_module(place: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    parts = place.split(".")
    if not all(part.isidentifier() for part in parts):
        raise TargetNotFound(f"{place!r} is neither a .py file nor the name of a module", use=FORMS)
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            found = None
        if found is None:
            use = f"{'/'.join(parts)}.py:..." if Path(*parts).with_suffix(".py").is_file() else FORMS
            raise TargetNotFound(f"there is no module {name}{f' (in {place})' if name != place else ''}", use=use)
    with _of_the_user(f"importing {place}", None):
        return importlib.import_module(place)


@contextlib.contextmanager
def _of_the_user(doing: str, path: Path | None) -> Any:
    """Errors of the user's own code as one message that names its line."""
    try:
        yield
    except AutoparError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TargetNotFound(f"{doing} failed: {type(error).__name__}: {error}", where=_line_of(error, path)) from error


def _line_of(error: BaseException, path: Path | None) -> str | None:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    at, line = error.__traceback__, None
    while at is not None:
        file = at.tb_frame.f_code.co_filename
        if (path is not None and Path(file).resolve() == path.resolve()) or (
            path is None and __file__ != file and "importlib" not in file
        ):
            line = f"{file}:{at.tb_lineno}"
        at = at.tb_next
    return line


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise TargetNotFound(f"{place} has no {name}", use=_candidates(module, name))
        value = getattr(value, part)
    return value


def _candidates(module: ModuleType, name: str) -> str:
    """What a file has that could be a target, closest to the name first."""
    found = []
    for key, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if key.startswith("_") or not (own or isinstance(value, nn.Module)):
            continue
        if (
            isinstance(value, nn.Module)
            or (isinstance(value, type) and issubclass(value, nn.Module))
            or (callable(value) and not isinstance(value, type))
        ):
            found.append(key)
    close = difflib.get_close_matches(name, found, 8, 0.0)
    return f"one of {', '.join(close)}" if close else "a file with a function that returns (model, example_inputs)"


# ---- what a name stands for ---------------------------------------------------------------------------------------


def _built(value: Any, module: ModuleType, text: str, meta: bool) -> Target:
    if isinstance(value, nn.Module):
        return Target(value, _example_inputs(value, module, text))
    if isinstance(value, type) and issubclass(value, nn.Module):
        model = _on_meta(value, meta, f"making {text}()", module)
        return Target(model, _example_inputs(model, module, text))
    if not callable(value) or isinstance(value, type):
        raise TargetNotFound(
            f"{text} is a {'class' if isinstance(value, type) else type(value).__name__}",
            use="a function returning (model, example_inputs), or an nn.Module",
        )
    result = _on_meta(value, meta, f"calling {text}()", module)
    if not (isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], nn.Module)):
        kinds = (
            ", ".join(type(item).__name__ for item in result)
            if isinstance(result, (tuple, list))
            else type(result).__name__
        )
        raise TargetNotFound(
            f"{text}() returned {kinds}",
            use="(model, example_inputs): an nn.Module, and a dict or tuple of its arguments",
        )
    return Target(result[0], _checked(result[1], text))


def _on_meta(build: Callable[[], Any], meta: bool, doing: str, module: ModuleType) -> Any:
    """Call on the meta device; on the real one if not `meta`, or if the code reads tensors' values while it builds."""
    path = Path(module.__file__) if module.__file__ else None
    if meta:
        with contextlib.suppress(Exception), torch.device("meta"):
            return build()
    with _of_the_user(doing, path):
        return build()


def _example_inputs(model: nn.Module, module: ModuleType, text: str) -> ExampleInputs:
    found = getattr(model, "example_inputs", None)
    if found is None:
        found = getattr(module, "example_inputs", None)
    if found is None:
        raise TargetNotFound(
            f"{text} is a model without example inputs",
            use="an attribute or function `example_inputs` of the class or its file, "
            "or a function returning (model, example_inputs)",
        )
    if callable(found) and not isinstance(found, (dict, tuple)):
        with _of_the_user(f"calling example_inputs() of {text}", None):
            found = found()
    return _checked(found, text)


def _checked(inputs: Any, text: str) -> ExampleInputs:
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if isinstance(inputs, (Mapping, tuple, list)):
        return inputs if isinstance(inputs, Mapping) else tuple(inputs)
    raise TargetNotFound(
        f"the example inputs of {text} are a {type(inputs).__name__}", use="a dict of keyword arguments, or a tuple"
    )


# ---- Hugging Face -------------------------------------------------------------------------------------------------


def _hub_model(model_type: str, meta: bool, settings: Sequence[str], batch: int, seq: int) -> Target:
    try:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise TargetNotFound(
            "hf: targets need transformers, which is not installed", use="pip install transformers"
        ) from error
    logging.set_verbosity_error()
    types = sorted(kind.model_type for kind in MODEL_FOR_CAUSAL_LM_MAPPING)
    if model_type not in types:
        near = difflib.get_close_matches(model_type, types, 6, 0.4)
        raise TargetNotFound(
            f"transformers has no causal language model of type {model_type!r}", use=_listed(near or types)
        )
    config = AutoConfig.for_model(model_type)
    changes = {}
    for setting in settings:
        key, value = _setting(setting, config, model_type)
        changes[key] = value
    try:
        config = AutoConfig.for_model(model_type, **changes)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and seq > longest:
            raise BadArgument(
                f"--seq {seq} is more than the {longest} positions of {HUB}{model_type}",
                use=f"--seq {longest}, or --set max_position_embeddings={seq}",
            )
        with torch.device("meta" if meta else "cpu"):
            model = AutoModelForCausalLM.from_config(config)
            tokens = torch.randint(0, config.get_text_config().vocab_size, (batch, seq))
    except AutoparError:
        raise
    except Exception as error:  # a config that does not fit together, in the library's own words
        raise BadArgument(f"{HUB}{model_type} cannot be built so: {type(error).__name__}: {error}") from error
    return Target(model, {"input_ids": tokens, "labels": tokens.clone()})


def _setting(setting: str, config: Any, model_type: str) -> tuple[str, Any]:
    """KEY=VALUE as a value of the kind that the default config has there. BadArgument for an unknown key or another
    kind.
    """
    key, equals, text = setting.partition("=")
    if not equals:
        raise BadArgument(f"--set {setting}", use="--set KEY=VALUE")
    known = sorted({*config.to_dict(), *config.attribute_map})
    if key not in known:
        near = difflib.get_close_matches(key, known, 4, 0.5)
        raise BadArgument(f"the config of {HUB}{model_type} has no {key!r}", use=_listed(near or known))
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        value = text
    before = getattr(config, key, None)
    if isinstance(before, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(before, (bool, int, float, str)) and value is not None and type(value) is not type(before):
        raise BadArgument(
            f"--set {setting}: {key} is a {type(before).__name__}, as in {key}={before}",
            why=f"{text!r} is read as {type(value).__name__}",
        )
    return key, value


def _listed(names: Iterable[str], most: int = 24) -> str:
    names = list(names)
    return f"one of {', '.join(names[:most])}{', ...' if len(names) > most else ''}"
