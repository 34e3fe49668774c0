"""One module a component: its `score` is found by the module's name, as `reward.weights: {NAME: 1.0}` spells it."""
