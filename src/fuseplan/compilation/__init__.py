"""What runs while a model is compiled and called: the pass manager, and what it needs of Dynamo."""
