"""`python -m ilora`: the notebooks in order, then the book; `table` and `sweep` are further commands."""

from ilora.study.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
