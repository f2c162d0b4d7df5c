"""``dinovmf VERB|SCRIPT.py ARGS`` (or ``python -m dinovmf_plugin``): every command of the plugin.

=========================  =============================================================
``pretrain``, ``knn`` ...  the plugin's scripts (``scripts/``), by their short names
``import``, ``export``     weights in and out (``checkpoints``, ``publishing``)
``recipes [WORD]``         the recipes there are; ``--markdown``: docs/recipes.md
``keys``                   every key of every verb, as Markdown
``doctor [--json]``        what this machine has and lacks
``path/to/main_knn.py``    a script of solo-learn, with the plugin's methods registered
=========================  =============================================================
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from dinovmf_plugin.runs.cli import one_clear_message


def _recipes(words: list[str]) -> int:
    from dinovmf_plugin.recipes import list_recipes, recipe_reference

    if words == ["--markdown"]:
        print(recipe_reference(), end="")
        return 0
    found = {name: told for name, told in list_recipes().items() if all(w in name for w in words)}
    if not found:
        raise ValueError(f"no recipe is named like {' '.join(words)!r}: see dinovmf recipes")
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {told}" for name, told in found.items()))
    return 0


def _prepare_for_host_script() -> None:
    """Register the methods; without a GPU, what the host's scripts send to one stays on the CPU.

    ``main_knn.py`` calls ``.cuda()``, ``main_umap.py`` says ``"cuda:0"``; neither uses hydra nor has a device
    option: without this they know none of the plugin's methods, and stop on a machine without CUDA.
    """
    import torch

    from dinovmf_plugin.registry import register

    register()
    if not torch.cuda.is_available():
        for kind in (torch.Tensor, torch.nn.Module):
            kind.cuda = _stay  # type: ignore[method-assign, assignment]
            kind.to = _to_cpu(kind.to)  # type: ignore[method-assign, assignment]


def _stay(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    return self


def _to_cpu(method):  # type: ignore[no-untyped-def]
    """``Tensor.to`` or ``Module.to`` for which a CUDA device means the CPU."""
    import torch

    def to(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        def moved(value):  # type: ignore[no-untyped-def]
            named = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return "cpu" if named else value

        return method(self, *map(moved, args), **{k: moved(v) for k, v in kwargs.items()})

    return to


@one_clear_message
def main(argv: list[str] | None = None) -> int:
    """Dispatch; returns the exit status."""
    from dinovmf_plugin.commands import key_reference, usage, verb_help, verbs

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb == "import":
        from dinovmf_plugin.checkpoints.cli import import_main

        return int(import_main(rest))
    if verb == "export":
        from dinovmf_plugin.publishing.cli import export_main

        return int(export_main(rest))
    if verb == "recipes":
        return _recipes(rest)
    if verb == "doctor":
        from dinovmf_plugin.doctor import doctor_main

        return doctor_main(rest)
    if verb == "keys":
        print(key_reference(), end="")
        return 0
    script = verbs().get(verb)
    if script is not None:
        told = verb_help(verb) if {"-h", "--help"} & set(rest) else None
        if told is not None:
            print(told)
            return 0
        sys.argv = [verb, *rest]
        # as __main__: Lightning starts further processes (devices=2) by the name of the main module
        runpy.run_module(f"dinovmf_plugin.scripts.{script}", run_name="__main__", alter_sys=True)
        return 0
    path = Path(verb)
    if not path.is_file():
        raise FileNotFoundError(f"{verb!r} is neither a verb nor a file\n{usage()}")
    _prepare_for_host_script()
    sys.argv = [str(path), *rest]
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
