"""What models with frozen random weights compute, kept in `golden.json`.

    python -m tests.golden.make            measure again over the frozen models
    python -m tests.golden.make --models   first freeze the models of the present code

The file holds configurations and tensor shapes as version 0.1.0 writes them; weights come from the names
of the tensors. So it also shows that directories of 0.1.0 load. It changes only when an output is meant
to change, and the commit that changes it says why.
"""
