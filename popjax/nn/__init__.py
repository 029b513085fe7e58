"""The neural network: pure functions (`ops`), Linen shells over them (`layers`), `transformer`."""
