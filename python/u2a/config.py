"""The whole configuration: one frozen, strict tree of models, read with every fault at once.

Relative file paths are relative to the folder of the YAML file and resolved on load, so the saved
configuration (`Config.to_yaml`) replays from anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from u2a import strict_yaml
from u2a.config_eval import EvalConfig
from u2a.config_faults import describe, is_file, missing_file, set_override
from u2a.config_sections import (
    DataConfig,
    GuardConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    Section,
    SolveConfig,
    SourceConfig,
    UnlearnConfig,
    ValidateConfig,
)
from u2a.config_select import SelectConfig
from u2a.errors import ConfigError
from u2a.loss_names import combination_faults
from u2a.objective_names import objective_faults


class Config(Section):
    """`schema_version` and `validation` are spelt `schema` and `validate` in the file."""

    schema_version: Literal[1] = Field(1, alias="schema")
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    solve: SolveConfig = SolveConfig()
    select: SelectConfig = SelectConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    guard: GuardConfig = GuardConfig()
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data with the file's key names, defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The complete resolved configuration; `load_config` reads it back to an equal Config."""
        return strict_yaml.dump(self.to_dict())


def make_config(
    data: Any, *, source: str = "config", base: Path | None = None, faults: list[str] | None = None
) -> Config:
    """Validates nested plain data. `base` is the folder that relative file paths start from.

    Raises ConfigError with every fault, `faults` (found earlier) among them.
    """
    faults = list(faults or [])
    if not isinstance(data, dict):
        raise ConfigError([*faults, f"(top): {data!r:.60}, wanted a mapping of sections"], source)
    data = _resolve_paths(data, base or Path.cwd(), faults)
    try:
        config = Config.model_validate(data)
    except ValidationError as e:
        raise ConfigError(faults + describe(e, Config), source) from None
    faults += combination_faults(config) + objective_faults(config)
    if faults:
        raise ConfigError(faults, source)
    return config


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> Config:
    """Reads a YAML file; `overrides` maps dotted keys to text ("unlearn.lr" -> "2e-5").

    Raises ConfigError (exit 2) listing all faults as "path: value, wanted, nearest".
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"byte {e.start}: not UTF-8", str(path)) from None
    except OSError as e:
        raise ConfigError(missing_file(str(path), path, e.strerror or ""), str(path)) from None
    data, faults = strict_yaml.parse(text)
    if data is None:
        faults = faults or ["(top): empty file, wanted a mapping of sections"]
        raise ConfigError(faults, str(path))
    for key, value in (overrides or {}).items() if isinstance(data, dict) else ():
        set_override(data, key, value, Config, faults)
    return make_config(data, source=str(path), base=path.absolute().parent, faults=faults)


def _resolve_paths(data: dict[str, Any], base: Path, faults: list[str]) -> dict[str, Any]:
    """A copy of `data` with file paths absolute; what names a file that is not there is a fault."""

    def resolved(section: Any, key: str, where: str) -> Any:
        if not (isinstance(section, dict) and isinstance(section.get(key), str)):
            return section
        name = section[key]
        found = (base / Path(name).expanduser()).absolute()
        if not is_file(name, found, folder_only=key == "name"):
            return section
        if not found.exists():
            faults.append(missing_file(f"{where}.{key}: {name!r}", found))
        return {**section, key: str(found)}

    def sources(section: Any, where: str) -> Any:
        if not isinstance(section, dict):
            return section
        if "path" in section:
            return resolved(section, "path", where)
        return {k: sources(v, f"{where}.{k}") for k, v in section.items()}

    out = data | {name: sources(data[name], name) for name in ("data", "eval") if name in data}
    if "model" in data:
        out["model"] = resolved(data["model"], "name", "model")
    return out


__all__ = ["Config", "DataConfig", "SourceConfig", "load_config", "make_config"]
