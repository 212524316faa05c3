"""Episodes from the policy, as the learner wants them: module, runner, advantages."""
