"""`sparqle NAME ...`: every command of the project; `python -m sparqle_jax.NAME ...` is the same."""

import importlib
import sys

# Command -> module with its main(argv).
COMMANDS = {
    "app": "sparqle_jax.app",
    "demo": "sparqle_jax.demo.__main__",
    "evaluate": "sparqle_jax.evaluate",
    "export": "sparqle_jax.export",
    "import": "sparqle_jax.import_published",
    "plan_tpu": "sparqle_jax.plan_tpu",
    "prepare": "sparqle_jax.data.prepare",
    "say": "sparqle_jax.demo.say",
    "show": "sparqle_jax.data.show",
    "train": "sparqle_jax.train",
    "transcribe": "sparqle_jax.transcribe",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        names = ", ".join(COMMANDS)
        print(
            f"sparqle COMMAND ... with one of: {names}; each has --help.",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
