"""The verbs that this package adds to the command `redraft`: (first line of the help, what runs it). Imported by `redraft --help`."""

TRAIN = "Train a drafter for a model, from text that the model writes.", "redraft_train.cli:train"
