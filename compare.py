"""Compare finished runs: print tables with a verdict. With --out, also write them as Markdown, and figures.

python compare.py out/demo_adam out/demo_sophiag --out=out/demo
python compare.py out/sweep/adamw_*_seed* out/sweep/sophiag_*_seed* --out=out/figure

It reads metrics.jsonl and config.json of each run. Runs that differ only in the seed become one row. The first run is
the baseline. Runs with other data, batch sizes or evaluations are refused.
"Better" and "worse" need p < 0.01 in Welch's test, two seeds on both sides, finished schedules and the same number of
steps. docs/comparing.md has this and the other rules.
"""

import os
from pathlib import Path

from analysis.figures import draw
from analysis.runs import check_comparable, group, read_run
from analysis.tables import report, run_table
from training.errors import Parser, UserError, command
from training.metrics import STATE


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run; the first is the baseline")
    help = "write the tables to PREFIX.md, figures to PREFIX*.png, .svg"
    parser.add_argument("--out", type=os.path.expanduser, metavar="PREFIX", help=help)
    parser.add_argument("--force", action="store_true", help="compare runs that would be refused")
    parser.add_argument("--scaling", action="store_true", help="allow several model sizes; draw loss against size")
    parser.add_argument("--wandb", action="store_true", help="upload the figures to the baseline's wandb_project")
    arguments = parser.parse_args(argv)
    if arguments.wandb and not arguments.out:
        raise UserError("--wandb uploads the figures of --out=PREFIX; give a prefix.")
    runs = [read_run(folder) for folder in arguments.runs if Path(folder).name != STATE]  # SWEEP/* includes sweep.json
    if not runs:
        raise UserError(f"{arguments.runs[0]} is the state of a sweep; name the out_dir of a run.")
    if not arguments.force:
        check_comparable(runs, arguments.scaling)
    groups = group(runs)
    text = "\n".join(report(groups)) + "\n"
    print(text, end="")
    if arguments.out:
        figures = draw(groups, arguments.out, arguments.scaling)
        Path(f"{arguments.out}.md").write_text(text + "\n" + "\n".join(run_table(groups)) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}.md, {', '.join(figures)}; each figure as .svg too")
        if arguments.wandb:
            upload(figures, runs[0].config.get("wandb_project"), Path(arguments.out).name)


def upload(figures, project, name):
    """Upload the figures to wandb, as a run of their own."""
    import wandb

    try:
        with wandb.init(project=project, name=name, job_type="compare") as run:
            run.log({Path(figure).stem: wandb.Image(str(figure)) for figure in figures})
    except Exception as error:  # no account, mostly
        problem = f"wandb raised {type(error).__name__} ({(str(error).splitlines() or [''])[0]})"
        raise UserError(f"{problem}; run `wandb login`, or leave --wandb out.") from None


if __name__ == "__main__":
    command(main)
