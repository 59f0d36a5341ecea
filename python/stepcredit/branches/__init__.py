"""What counterfactual scoring is made of: contexts that fork from rollouts, their token trees, one pass over them."""
