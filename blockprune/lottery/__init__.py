"""Training and experiments: recipes, the loop, what a run found.

Nothing is imported here, so that reading results (`lottery.results`) needs no torch.
`recipe`, `results` and `training` know nothing of pruning; `experiment` composes.
"""

from __future__ import annotations
