"""What the layers of a trained model do, seen as steps of an optimizer, with error bars.

    watched = Watched(model)               # a copy that tells what its substeps do
    curve.loss_curve(watched, ids)         # loss after every substep
    path.motion(watched, ids)              # sizes, angles, what streams keep
    field.field_of(watched, ids, 0)        # is the first oracle a gradient?
    energy.energy(watched, ids)            # does attention ascend its interaction energy?
    stability.stability(watched, ids)      # do the substeps contract?
    gauss_newton.share_of(Surface(model, ids))

docs/analysis-dynamics.md says what each number means. Errors are over sequences, since tokens of
one sequence are not independent; those of `gauss_newton` are over probes.
"""
