"""What people and their tools see of a run.

    styled    lines of text with styles, the same plain or in colour
    words     values in the field's words: entries, error codes, registers, outcomes
    findings  the divergences of one probe, and what is wrong in a sentence
    walks     a finding drawn: the model's walk and the machine's, side by side
    summary   a whole run as one value
    terminal  progress while it runs, and the table at its end
    jsonfile  the `--json` object
    junit     the `--junit` file
    journal   each result as it comes, for a run that is killed
    coverage  which cells were reached, of one run or several
    output    result files: checked before a run, written whole or not at all
"""
