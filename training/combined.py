"""Optimizers of different parameters as one, for a run: matrices by one, embeddings and vectors by another.

optimizer = Combined(sophia=SophiaG(matrices), adamw=torch.optim.AdamW(others))
"""


class Combined:
    """What a run asks of an optimizer goes to each of `parts`, in their order; a step's arguments are for the first.

    A part's rate may be a multiple of the run's: `lr_scale` of its groups.
    """

    def __init__(self, **parts):
        self.parts = parts
        supports = [getattr(part, "_step_supports_amp_scaling", False) for part in parts.values()]
        self._step_supports_amp_scaling = all(supports)

    @property
    def param_groups(self):
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self):
        return {parameter: state for part in self.parts.values() for parameter, state in part.state.items()}

    def step(self, **arguments):
        for part in self.parts.values():
            part.step(**arguments)
            arguments = {}

    def zero_grad(self, set_to_none=True):
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def register_load_state_dict_pre_hook(self, hook):
        for part in self.parts.values():
            part.register_load_state_dict_pre_hook(hook)
