"""The rules, by idea: one module for each way in which an operator relates its dimensions."""
