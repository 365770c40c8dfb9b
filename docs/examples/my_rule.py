from polyak.rules import Stream, UpdateRule, unit_interval


class MyRule(UpdateRule):
    """v ← βv + (1−β)O(x); x ← x + (1−ν)O(x) + νv: quasi-hyperbolic momentum (arXiv:1810.06801)."""

    streams = (Stream("v", start="zeros"),)
    beta, nu = unit_interval(0.5), unit_interval(0.5)

    def step(self, x, state, oracle):
        g = oracle(x)
        v = self.beta * state.v + (1 - self.beta) * g
        return x + (1 - self.nu) * g + self.nu * v, state.replace(v=v)
