"""Measure speed and memory of this repository and of its peers. Contenders take turns in one process.

    python bench.py optimizer [--official PATH] [--models 124M,355M,774M]
    python bench.py train [--nanogpt PATH] [--official PATH] [--models 124M,355M]
    python bench.py losses HEAD~1 HEAD ["HEAD~1 --batch_size=32"]
    python bench.py data [--device cuda]
    python bench.py table assets/bench/optimizer.json

A subcommand prints its rows at once and writes them as JSON: {"device", "torch", "commit", "command", "rows":
[{"contender", "model", "metric", "value", "unit"}]}. A contender that fails adds a line to "errors" and no row.
"""

from benchmarks import data, losses, optimizer, train
from benchmarks.report import markdown_table
from training.errors import Parser, command
from training.tracking import git_state

BENCHMARKS = {
    "optimizer": (optimizer, "one optimizer step, curvature update and clipping, against peers"),
    "train": (train, "tokens/s and memory of training, against peers; the cost of curvature; several GPUs"),
    "losses": (losses, "differences between the losses of short runs at two commits or with two settings"),
    "data": (data, "speed of prepare.py against tiktoken alone; time that the input pipeline adds to a step"),
}


def main(argv=None):
    parser = Parser(description=__doc__)
    commit, changed = git_state()
    head = f"{commit}-dirty" if changed else commit
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (module, help) in BENCHMARKS.items():
        sub = commands.add_parser(name, help=help)
        module.add_arguments(sub)
        sub.add_argument("--out", default=f"assets/bench/{name}.json", help="JSON file to write (default: %(default)s)")
        sub.add_argument("--commit", default=head, help="recorded in the JSON; default: git's HEAD")
        sub.set_defaults(run=module.run)
    sub = commands.add_parser("table", help="print another subcommand's JSON as a Markdown table")
    sub.add_argument("result", metavar="JSON", help="a file that another subcommand wrote")
    sub.set_defaults(run=lambda args: print(markdown_table(args.result)))
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command(main)
