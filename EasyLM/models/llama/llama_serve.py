"""The HTTP service under the name that EasyLM's users expect; the same program as `python -m evaluation.serve`."""

if __name__ == "__main__":
    from evaluation.serve import cli

    cli()
