"""What to run: the op vocabulary, scenario files, and the world that a scenario starts in.

    ops       what a scenario can say, and how probes are written
    files, writer   scenario files (TOML): reading them, with the line of every mistake; writing them
    modes     the modes of L1 and L2, and where things lie in each
    world, tables, initial   the tables, the VMCB and the names that each scenario starts with
    program   a scenario turned into the ops that L1 interprets
    sweep, sweepfiles   a template of ops and its axes, of which every combination is a case; reading them (TOML)
    space, cover   the cases of a sweep; the order in which they are tried
    generate, draws, situations, aims   programs that nobody wrote: what they are drawn from, and what they aim at
    shrink    smaller scenarios
"""
