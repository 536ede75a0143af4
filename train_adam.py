"""Pre-train GPT-2 with a first-order optimizer: the baselines that Sophia has to beat.

python train_adam.py config/train_shakespeare_char_adam.py
python train_adam.py config/train_shakespeare_char_adam.py --optimizer_name=muon --out_dir=out/muon
torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_adam.py --batch_size=12
"""

from dataclasses import dataclass

from training.config import TrainConfig, load_config, setting
from training.errors import command
from training.optimizers import FIRST_ORDER, SECOND_ORDER, make_optimizer
from training.run import Run


@dataclass
class AdamConfig(TrainConfig):
    optimizer_name: str = setting(
        "adamw", "see docs/settings.md", choices=FIRST_ORDER, elsewhere=("train_sophiag.py", SECOND_ORDER)
    )
    momentum: float = setting(
        0.95, "Nesterov momentum", at_least=0.0, below=1.0, needs=("optimizer_name", ("sgd", "muon", "whitened_muon"))
    )


def main(argv=None, config_class=AdamConfig, run_class=Run):
    config = load_config(config_class, argv)
    with run_class(config) as run:
        run.set_optimizer(make_optimizer)
        for step in run.steps():
            run.backward(run.train_batch(step))
            run.optimizer_step()


if __name__ == "__main__":
    command(main, goes_on=True)
