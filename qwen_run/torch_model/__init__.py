"""An engine as a model of transformers. Needs torch and transformers; nothing else imports this package."""
