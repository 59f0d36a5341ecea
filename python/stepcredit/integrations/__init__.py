"""StepCredit inside trainers that people already run; each module needs the framework it is named after."""
