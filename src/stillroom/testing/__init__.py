"""Public test doubles: a fake endpoint to rehearse and to test a collection against. Nothing here is needed by a run."""
