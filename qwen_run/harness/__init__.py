"""An engine as a model of EleutherAI's lm-evaluation-harness. Needs lm_eval; nothing else imports this package."""
