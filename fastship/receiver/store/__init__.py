"""``<root>/episodes/``: what is published, how it comes to be, and whether it is still there.

Of the receiver it imports ``uploads`` and ``policy``. Inside:
(``small`` > ``ending`` | ``scrub`` > ``custody``) > ``store`` > (``recount`` > ``accounts`` | ``rotted``) >
``receipts``.
"""
