"""What people and their tools see of a run.

    styled    lines of text with styles, the same plain or in colour
    words     values in the field's words: entries, error codes, registers, outcomes
    findings  the divergences of one probe
    headline  what is wrong, in a sentence
    beside    both walks of a finding, step by step
    walks, svg   a finding drawn, as text and as a picture
    summary   a whole run as one value
    table     what it came to, as text
    terminal  progress while it runs
    html, timeline   the `--html` page, which harness/report/page draws; each VMRUN of a run for it
    jsonfile, junit   the `--json` object, and the `--junit` file
    journal   each result as it comes, for a run that is killed
    output    result files: checked before a run, written whole or not at all
    bundle, records   one finding to be sent to somebody, with what L1 posted
    export_c  the same as a C test
    stops, audits   one of a foreign L1; one of the tables of the KVM under it
    catches   what a fuzzing run found
    matrix    findings by version
    coverage  which cells were reached, of one run or several
"""
