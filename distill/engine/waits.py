"""Where the host may wait for the device within a step; everywhere else it goes ahead.

The rehearsal (tests/rehearsal) makes an error of every other wait, and of every copy that needs one.
"""

MAY_WAIT = {
    "distill/tracking/meters.py:Meters.flush": "a row of metrics is due",
    "distill/engine/watch.py:Watch.problem": "before a row, an evaluation or a checkpoint: was anything not finite?",
    "student/checked_factor.py:CheckedFactor.problem": "with a row of metrics: values of a user's factor",
    "student/evaluate.py:_on_host": "sums over the held-out text, at its end",
    "distill/engine/checkpoint.py:_on_host": "a checkpoint is written",
    "teacher/capture.py:_on_host": "the targets of a step go to the host, where they are encoded and published",
    "teacher/capture.py:Capture._release": "targets are published only where the step that made them was finite",
    "distill/model/decode.py:_all": "generation ends with its last row; asked where ids can end one",
    "distill/model/decode.py:_cut": "the end of each generated row",
}
"""By file and function, why."""
