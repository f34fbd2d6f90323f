"""Webhooks: endpoints of owners that hear what happens to jobs. Standard Webhooks 1.0 (www.standardwebhooks.com).

announce.py writes the messages, endpoints.py keeps who gets them, deliveries.py when, sending.py sends one, and
addresses.py says where none may go.
"""
