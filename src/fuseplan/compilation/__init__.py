"""The parts that run while a model is compiled and called: the pass manager, and its use of Dynamo."""
