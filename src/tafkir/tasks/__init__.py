"""Tasks: examples, prompts and graders. One grader is the metric of `eval` and the reward of `rlvr` alike."""
